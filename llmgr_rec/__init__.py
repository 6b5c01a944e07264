"""Session recommendation with sharded item tables, a session graph network and a LoRA-tuned LLaMA."""
