"""Text datasets: embedded, local or from the Hub. This folder contains only code."""
