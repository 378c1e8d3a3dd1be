"""What is measured: throughput of training and decoding, memory, and ablations. Nothing else imports this room."""
