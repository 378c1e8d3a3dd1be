"""PushT: gym-pusht with exact seeds (`env.py`), and an expert that plans its pushes (`expert.py`)."""
