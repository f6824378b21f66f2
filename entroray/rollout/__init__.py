"""Groups drawn: plans, tools, second draws, replay, and the window of groups in flight."""
