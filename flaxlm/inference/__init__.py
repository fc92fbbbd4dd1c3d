"""From a trained model to text: cached decoding and sampling."""
