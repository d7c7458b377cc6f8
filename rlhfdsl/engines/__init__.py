"""DeepSpeed engines over the models of a stage, the rollout, and the artifacts that they leave."""
