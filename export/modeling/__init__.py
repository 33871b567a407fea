"""torch modules for export: the reference's arithmetic in a form that traces to one small graph."""
