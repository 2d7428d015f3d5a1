"""The decode node: KV tiles become pages, pages become tokens at any scale."""
