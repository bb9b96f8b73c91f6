"""Image datasets: loading, splits and views."""
