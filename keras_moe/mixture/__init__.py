"""The layers that join gating, dispatch and experts, and what looks at them from outside."""
