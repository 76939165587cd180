"""A function of every expert's own rows: `apply` runs expert i's function on the rows of expert i.

How many rows each expert has depends on the data, and there are four ways to live with that.

* Piece by piece: every expert has a product of its own, with just its rows.
* Batched: each expert has C places, and one batched product computes all of them.
* Alone: a loop goes from expert to expert, and each computes just its own rows.
* Block by block (`blocks.py`): the rows are cut into blocks of equal size, each of one expert, and
  all blocks are computed at once. Only here the shapes don't depend on the data, as XLA and TPUs
  need it, at up to twice the operations.

Up to 64 experts are computed piece by piece. With more, the graph is not to grow, and the second
and the third way go together: what finds no place in the batch is computed alone. `even_capacity`
is the rule that divides the work. It leaves a few rows, and the many rows of an expert far above
the others, to the loop.

One example alone needs none of that: `one_example` calls the functions of its K experts.
"""

import tensorflow as tf

from keras_moe.blocks import block_by_block

MOST_PIECES = 64  # the most experts to be computed piece by piece, each by operations of its own

# What `even_capacity` counts with, measured on 2 cores with AVX-512, in rows: the time that one
# row of an expert takes, that is P multiply-adds for an expert of P parameters.
_READ = 50  # to read an expert's parameters and to write their gradient
_ADD = 20  # to add the gradients of the loop to those of the batch, for every expert
_TURN = 100, 2e7  # a turn of the loop: rows, and multiply-adds whatever the expert's size
_TURN_FORWARD = 60, 4.5e6  # the same outside training, in the time of a row there


def even_capacity(rows_per_expert, size, training=True):
    """The number of places per expert with which `apply` is estimated to be fastest.

    Up to 64 experts need none: 0, an integer. With more and C > 0 the batch costs as much as
    N·(C + 50) rows. Each expert that has more than C rows costs as much as 100 rows more and 2·10⁷
    multiply-adds, and all of them together as 20·N rows if there is a batch, too. Without gradients
    it is 60 rows and 4.5·10⁶ multiply-adds, and those 20·N rows are saved.

    Args:
        rows_per_expert: int32 [N].
        size: P.
        training: Whether there will be gradients.

    Returns:
        Integer or int32 scalar, 0 or the number of rows of some expert.
    """
    num_experts = rows_per_expert.shape[0]
    if num_experts <= MOST_PIECES:
        return 0
    # The candidates are the experts' numbers of rows, the largest first, and 0.
    rows = tf.concat([tf.sort(rows_per_expert, direction="DESCENDING"), [0]], axis=0)
    alone = tf.range(num_experts + 1)  # so many experts have more rows, or as many
    above = tf.cumsum(rows, exclusive=True) - alone * rows
    rows, alone, above = (tf.cast(x, tf.float32) for x in (rows, alone, above))
    batch = tf.where(rows > 0, num_experts * (rows + _READ), 0.0)
    turn, add = (_TURN, _ADD) if training else (_TURN_FORWARD, 0)
    both = tf.where(tf.logical_and(rows > 0, alone > 0), float(num_experts * add), 0.0)
    loop = alone * (turn[0] + turn[1] / size) + above
    return tf.cast(tf.gather(rows, tf.argmin(batch + both + loop)), tf.int32)


def apply(function, rows, rows_per_expert, banks, capacity=0, static_shapes=False):
    """Applies each expert's function to the rows of that expert.

    Args:
        function: Called with rows and one array per bank: [rows of that expert, D] and [...], or
            many experts' rows [G, size, D] and [G, ...]. It treats each row by itself and returns
            rows of another width.
        rows: Float tensor [M, D]: `capacity` rows of each expert, then others, sorted by expert.
        rows_per_expert: int32 [N], how many others. Rows behind those belong to no expert.
        banks: List of tensors or variables [N, ...], the experts' parameters.
        capacity: C, an integer or int32 scalar.
        static_shapes: Whether the shapes must not depend on `rows_per_expert`. Only with C = 0.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """
    banks = [tf.convert_to_tensor(bank) for bank in banks]
    if static_shapes:
        return block_by_block(function, rows, rows_per_expert, banks)
    if isinstance(capacity, int) and capacity == 0 and rows_per_expert.shape[0] <= MOST_PIECES:
        return _piece_by_piece(function, rows, rows_per_expert, banks)
    return _batched_and_alone(function, rows, rows_per_expert, banks, capacity)


def one_example(function, x, experts, banks):
    """Applies several experts' functions to one example: nothing is sorted, padded or copied.

    Args:
        function: As in `apply`.
        x: Float tensor [1, D].
        experts: int32 [K], K known.
        banks: As in `apply`.

    Returns:
        Float tensor [K, width].
    """

    @tf.custom_gradient
    def call(x, *banks):
        parameters = [[bank[i] for bank in banks] for i in tf.unstack(experts)]

        def results(x, parameters):
            return tf.concat([function(x, *expert) for expert in parameters], axis=0)

        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch([x, parameters])
                y = results(x, parameters)
            of_x, of_experts = tape.gradient(
                y, [x, parameters], upstream, unconnected_gradients="zero"
            )
            of_banks = [
                tf.tensor_scatter_nd_add(tf.zeros_like(bank), experts[:, None], tf.stack(theirs))
                for bank, theirs in zip(banks, zip(*of_experts, strict=True), strict=True)
            ]
            return of_x, *of_banks

        return results(x, parameters), gradient

    return call(x, *map(tf.convert_to_tensor, banks))


def recomputed(function):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of float tensors or variables; its result is one float tensor.

    Returns:
        A function with the same results and gradients, that keeps its arguments alone.
    """

    @tf.custom_gradient
    def call(first, *others):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                arguments = [_after(upstream, first), *map(tf.identity, others)]
                tape.watch(arguments)
                again = function(*arguments)
            return tape.gradient(again, arguments, upstream)

        return function(first, *others), gradient

    # Not variables: a custom gradient would have to answer for each that it reads.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


def split(rows, rows_per_expert):
    """Cuts sorted rows into one piece per expert.

    Args:
        rows: Tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.

    Returns:
        A list of N tensors [rows of that expert, D], then the rest, which belongs to no expert.
    """
    rest = tf.shape(rows)[0] - tf.reduce_sum(rows_per_expert)
    sizes = tf.concat([rows_per_expert, rest[None]], axis=0)
    return tf.split(rows, sizes, num=sizes.shape[0])


def join(pieces, rest):
    """Undoes `split`; the rest, which no expert has seen, becomes zeros.

    Args:
        pieces: A list of N tensors [rows of that expert, D].
        rest: Tensor [R, any], the last piece that `split` returned.

    Returns:
        Tensor [M, D].
    """
    width = pieces[0].shape[-1]
    zeros = tf.zeros([tf.shape(rest)[0], width], pieces[0].dtype)
    return tf.concat([*pieces, zeros], axis=0)


def _piece_by_piece(function, rows, rows_per_expert, banks):
    *pieces, rest = split(rows, rows_per_expert)
    experts = zip(pieces, *map(_unstack, banks), strict=True)
    return join([function(*expert) for expert in experts], rest)


def _unstack(bank):
    """`tf.unstack` without a copy: slices along the first axis share the memory of the bank."""

    @tf.custom_gradient
    def slices(bank):
        def gradient(*upstream):
            return tf.stack(upstream)

        return [bank[i] for i in range(bank.shape[0])], gradient

    return slices(bank)


def _batched_and_alone(function, rows, rows_per_expert, banks, capacity):
    num_experts = rows_per_expert.shape[0]
    num_places = num_experts * capacity

    def batch_of(rows):
        return tf.reshape(rows[:num_places], [num_experts, capacity, rows.shape[-1]])

    def joined(batch, others):
        places = tf.reshape(batch, [num_places, batch.shape[-1]])
        return tf.cond(  # A concatenation with nothing would copy all the same.
            tf.size(others) > 0, lambda: tf.concat([places, others], axis=0), lambda: places
        )

    # One gradient for both ways: theirs of the banks, as large as the banks, are not to be added.
    @tf.custom_gradient
    def call(rows, *banks):
        batch, others = batch_of(rows), rows[num_places:]
        with tf.GradientTape() as tape:
            tape.watch([batch, *(bank for bank in banks if bank.dtype.is_floating)])
            y_batch = function(batch, *banks)
        y_others, gradient_alone = _alone(
            function, others, rows_per_expert, banks, y_batch.shape[-1]
        )

        def gradient(upstream):
            of_batch, *of_banks = tape.gradient(
                y_batch, [batch, *banks], batch_of(upstream), unconnected_gradients="zero"
            )
            of_others, experts, of_theirs = gradient_alone(upstream[num_places:])
            of_banks = [
                _add_at(experts, bank, theirs)
                for bank, theirs in zip(of_banks, of_theirs, strict=True)
            ]
            return joined(of_batch, of_others), *of_banks

        return joined(y_batch, y_others), gradient

    return call(rows, *banks)


def _add_at(experts, bank, theirs):
    """bank[experts] += theirs. Copies the bank, and so only where there is something to add."""
    return tf.cond(
        tf.size(experts) > 0,
        lambda: tf.tensor_scatter_nd_add(bank, experts[:, None], theirs),
        lambda: tf.identity(bank),
    )


def _alone(function, rows, rows_per_expert, banks, width):
    """Goes through the experts that have rows. The backward pass computes these rows again.

    Returns:
        The rows of the given width, zeros behind the last expert's, and a function from their
        gradient to that of `rows`, the experts that have rows, and the gradients of their
        parameters.
    """
    experts = tf.cast(tf.where(rows_per_expert > 0)[:, 0], tf.int32)
    number = tf.size(experts)
    sizes = tf.gather(rows_per_expert, experts)
    ends = tf.cumsum(sizes)
    num_rest = tf.shape(rows)[0] - tf.reduce_sum(rows_per_expert)

    def pieces(number, shape):
        return tf.TensorArray(rows.dtype, number, element_shape=shape, infer_shape=False)

    def piece_of(rows, i):
        return rows[ends[i] - sizes[i] : ends[i]]

    def arguments(i):
        return [piece_of(rows, i), *(bank[experts[i]] for bank in banks)]

    def loop(body, *arrays):
        _, *arrays = tf.while_loop(
            lambda i, *_: i < number,
            lambda i, *arrays: (
                i + 1,
                *(array.write(i, x) for array, x in zip(arrays, body(i), strict=True)),
            ),
            (0, *arrays),
        )
        return arrays

    def joined(array, width):
        return array.write(number, tf.zeros([num_rest, width], rows.dtype)).concat()

    (y,) = loop(lambda i: [function(*arguments(i))], pieces(number + 1, [None, width]))

    def gradient(upstream):
        def body(i):
            with tf.GradientTape() as tape:
                parts = arguments(i)
                tape.watch(parts)
                y = function(*parts)
            return tape.gradient(y, parts, piece_of(upstream, i), unconnected_gradients="zero")

        of_rows, *of_banks = loop(
            body,
            pieces(number + 1, [None, rows.shape[-1]]),
            *(pieces(number, bank.shape[1:]) for bank in banks),
        )
        return joined(of_rows, rows.shape[-1]), experts, [bank.stack() for bank in of_banks]

    return joined(y, width), gradient


def _after(upstream, x):
    """`x`, in a graph not to be had before `upstream`.

    Otherwise the optimizer of the graph sees that the second computation equals the first, and
    keeps the first one's results. XLA ignores control dependencies, so the value has to depend.
    """
    if tf.executing_eagerly():
        return tf.identity(x)
    some = tf.reduce_max(tf.reshape(upstream, [-1])[:1])  # -inf where there is no element
    return x + tf.cast(tf.abs(some) < 0, x.dtype)  # False, also for NaN; compilers don't know that
