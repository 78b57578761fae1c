"""What tells the people who run a deployment: owner alerts and the outbox that carries them."""
