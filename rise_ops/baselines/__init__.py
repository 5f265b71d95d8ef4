"""Other ways to say which rows matter for a query, behind one interface, to hold RISE against.

Each method names its paper. `rise_ops.baselines.base` has the interface, `rise_ops.comparison` runs methods side by
side on the same rows, queries and model.
"""
