"""What the sparse JEPA is measured against, trained by the same loop on the same feed."""
