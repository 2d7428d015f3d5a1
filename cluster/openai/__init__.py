"""OpenAI's HTTP protocol: an adapter in front of the front door, beside the gRPC one."""
