def print_plan():
    pass
