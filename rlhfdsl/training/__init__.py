"""The stages, each readable from top to bottom: sft, reward, dpo, ppo, grpo, rloo; losses and advantages are pure."""
