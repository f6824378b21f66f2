"""entroray: distributed RL for language models that measures, predicts and steers entropy."""
