"""What replicas can hold."""


def check_divides(replicas, number, unit):
    """Raises ValueError unless each replica can hold as many rows of a variable.

    Args:
        replicas: R.
        number: The number of rows.
        unit: What one row stands for.
    """
    if number % replicas:
        raise ValueError(
            f"With `expert_parallel=True` the number of {unit} must be a multiple of the number of "
            f"replicas. Received: {number} {unit}, {replicas} replicas"
        )
