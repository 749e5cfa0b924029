"""How tokens reach their experts, one file per transport; each is an `EPImplementation` of Transformers."""
