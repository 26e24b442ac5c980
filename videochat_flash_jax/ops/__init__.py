"""Operations with one contract each; models name the contract only."""
