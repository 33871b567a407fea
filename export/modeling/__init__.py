"""Export-friendly torch modules: the same arithmetic as the reference, in a form that exports to one lean graph."""
