"""Loading of labelled signals."""
