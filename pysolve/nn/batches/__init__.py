"""What users give: items become batches, batches samples; padding, and what no graph can be fitted to."""
