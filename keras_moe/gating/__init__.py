"""Which experts an example goes to, and with which weights.

`routing.py` has what every gating layer returns and shares, and the flat ones; the other files
have one gating layer each.
"""
