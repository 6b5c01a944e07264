"""Why a session gets its recommendations: parts of the scores, shares of the clicks, and pictures of them."""
