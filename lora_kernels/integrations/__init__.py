"""Links to other libraries. A library is imported by its own subpackage and nowhere else."""
