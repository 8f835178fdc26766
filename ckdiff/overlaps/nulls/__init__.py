"""What chance would do: the nulls, and the evidence that each needs."""
