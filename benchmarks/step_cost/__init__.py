"""What a step costs in time and memory, beside momentum SGD and AdamW."""
