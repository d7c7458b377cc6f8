"""The stages: sft, reward and ppo, each readable from top to bottom; losses and advantages are pure functions."""
