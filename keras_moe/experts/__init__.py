"""The banks of experts: feed-forward ones, clones of any layer, and their form in int8."""
