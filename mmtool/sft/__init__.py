"""Fine-tuning: `mmtool sft`."""
