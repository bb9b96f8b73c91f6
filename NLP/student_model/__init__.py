"""Text students, the methods and stages that distill them, and their evaluation."""
