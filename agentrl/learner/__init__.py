"""From rollout trees to new weights. Imports nothing of agentrl but types, errors and config."""
