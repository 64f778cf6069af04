"""What several processes send, wait for and share out, and a cost model for many of them."""
