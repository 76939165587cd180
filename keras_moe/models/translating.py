"""Translation by a trained model: a beam search whose steps are those of its decoder."""

from keras import ops

from keras_moe.models.beam_search import NEVER, beam_search
from keras_moe.models.words import PADDING_ID, as_ids


def translate(model, source, end_id, max_length=None, excluded=(), **options):
    """Does what `TranslationModel.translate` says."""
    source = as_ids(source)
    mask = source != PADDING_ID
    memory = model.attention_lstm.attention.remember(model.encode(source), mask)
    if max_length is None:
        max_length = 2 * ops.sum(ops.cast(mask, "int32"), axis=1) + 10
        options = {"max_steps": 2 * ops.shape(source)[1] + 10, **options}
    never = ops.one_hot(as_ids([PADDING_ID, *excluded]), model.vocabulary_size, dtype="bool")
    never = ops.any(never, axis=0)

    def step(ids, states):
        log_probs, states, attention = model.step(ids, states, memory)
        log_probs = ops.where(never, NEVER, ops.cast(log_probs, "float32"))
        return log_probs, states, attention

    size = ops.shape(source)[0]
    states = [model.attention_lstm.initial_states(size, 1)]
    for lstm in model.decoder_lstms:
        states.append(
            [ops.zeros((size, 1, units), model.compute_dtype) for units in lstm.cell.state_size]
        )
    start = ops.full((size,), end_id, "int32")
    options = {"end_id": end_id, "max_length": max_length, "source_mask": mask, **options}
    return beam_search(step, states, start, **options)
