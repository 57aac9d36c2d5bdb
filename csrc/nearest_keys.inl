// Loops of nearest_keys.cpp: the k keys of largest cosine to each query, of equal ones the first.
//
// search: a tile of queries by a block of keys: cosines [key][query] by a product, then one compare per vector with
// each query's k-th best so far. What passes is collected; a full buffer is cut to its k best, which raises that bar.
// Keys come in their order, so a later one with the same cosine never displaces an earlier one.

#include "contrastive_ce_pairs.inl"

// Of the blocks [block0, block1) the candidates of each query of a tile, at most k, into ``found`` [R][capacity], and
// their number. ``z``: scratch [K + 1][R].
static void search(const Pairs& p, int64_t tile, int64_t block0, int64_t block1, int64_t k, int64_t capacity,
                   Candidate* found, int32_t* count, float* z) {
  const int64_t n0 = p.row(tile);
  float* bar = z + p.K * p.R;
  fill(bar, p.R, -INFINITY);
  std::memset(count, 0, p.R * sizeof(int32_t));
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t Rp = cosines(p, tile, block, z), c0 = block * p.K, keys = p.keys_of(block);
    for (int64_t j = 0; j < Rp; j += W) {
      const vi id = load(p.query.id + n0 + j), instance = load(p.query.instance + n0 + j);
      const uint32_t there = j + W <= p.rows(tile) ? ~0u : (1u << (p.rows(tile) - j)) - 1;
      for (int64_t i = 0; i < keys; ++i) {
        const float* cosine = z + i * p.R + j;
        const vf c = load(cosine);
        vi hit = ~(vi)(c <= load(bar + j));  // a NaN too: it must be seen
        if (!bits(hit)) continue;
        hit &= ~(vi)(instance == p.key.instance[c0 + i]);
        if (c0 + i < p.private_keys) hit &= (vi)(id == p.key.id[c0 + i]);
        for (uint32_t rest = bits(hit) & there; rest; rest &= rest - 1) {
          const int64_t lane = __builtin_ctz(rest), r = j + lane;
          const float value = cosine[lane];
          found[r * capacity + count[r]++] = candidate(value != value ? INFINITY : value, c0 + i);
          if (count[r] == capacity) bar[r] = cut(found + r * capacity, count[r], k);
        }
      }
    }
  }
  for (int64_t r = 0; r < p.rows(tile); ++r) cut(found + r * capacity, count[r], k);
}
