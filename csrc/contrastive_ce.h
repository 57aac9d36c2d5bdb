// What contrastive_ce.cpp and nearest_keys.cpp exchange with their loops: plain pointers.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fastrex::contrastive {

// Queries or keys: those that count, in their order. An ignored one is not looked at.
struct Side {
  Matrix rows;
  int64_t count = 0;
  const int64_t* index = nullptr;      // [count] which row of the tensor
  const int32_t* id = nullptr;         // [count], queries padded to whole tiles
  const int32_t* instance = nullptr;   // as id
  const float* inverse = nullptr;      // [count] 1 / norm, 0 for a row that counts as zero
};

// Tiles of R queries by blocks of K keys, and the unit vectors as the products read them.
struct Pairs {
  Side query, key;
  int64_t D, Dp;          // features, and their number in whole panels of any instruction set
  int64_t private_keys;   // the first so many keys are seen by queries with the same id alone
  int64_t R, K, tiles, blocks;
  float* queries = nullptr;        // [tile][panel of queries][feature][P1]
  float* query_panels = nullptr;   // [tile][panel of features][R][P2], or null
  float* keys = nullptr;           // [block][panel of features][K][P2]
  int64_t row(int64_t tile) const { return tile * R; }
  int64_t rows(int64_t tile) const { return tile + 1 < tiles ? R : query.count - tile * R; }
  int64_t keys_of(int64_t block) const { return block + 1 < blocks ? K : key.count - block * K; }
};

// Exponents are taken to base 2: e^(c / temperature) = 2^(positive * c).
struct Loss {
  float positive, negative, hard;  // log2(e) / temperature, times 1 + hardness, times hardness
  // What every exponent is relative to, or with ``online`` their running maximum: where the smallest would underflow.
  float shift_positive, shift_negative, shift_hard;
  bool online;
  int margin_kind;
  float margin, cosine, sine;  // ... of the margin
};

// Sums of a split of the keys, [field][tiles * R]; counts as int32.
enum Field {
  SUM_POSITIVE, LOGIT_POSITIVE, SUM_NEGATIVE, SUM_HARD, BEST_POSITIVE, BEST_NEGATIVE, BEST_MARGIN, POSITIVES, NEGATIVES,
  FIELDS
};
// Of a query in the backward, [term][tiles * R]: the coefficients and the log-sums to base 2.
enum Term { A, B, C, H, LOG_POSITIVE, LOG_NEGATIVE, LOG_HARD, TERMS };

}  // namespace fastrex::contrastive
