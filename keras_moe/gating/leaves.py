"""The experts of a two-level gating, by their numbers among all."""

from keras import ops


def leaves(group, member, experts_per_group):
    """The experts' numbers among all, of choices at two levels.

    Args:
        group: Integer tensor [T, K_primary].
        member: Integer tensor [T·K_primary, K_secondary], the number within the group.
        experts_per_group: B.

    Returns:
        Integer tensor [T, K_primary·K_secondary].
    """
    (num_examples, num_groups), width = ops.shape(group), ops.shape(member)[1]
    # To the shape of the result first: TensorFlow would bring a conversion to int32 before it.
    first = (group * experts_per_group)[:, :, None]
    first = ops.broadcast_to(first, (num_examples, num_groups, width))
    shape = (num_examples, num_groups * width)
    return ops.reshape(first, shape) + ops.reshape(member, shape)
