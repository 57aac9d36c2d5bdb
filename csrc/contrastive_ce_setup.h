// What a call of contrastive_ce.cpp or nearest_keys.cpp prepares: which queries and keys count, tiles, packed unit
// vectors. Included once by each of them, inside its namespace and after the loops.

namespace {

using at::Tensor;
using contrastive::Pairs;
using contrastive::Side;
using Optional = const std::optional<Tensor>&;

constexpr int64_t MOST_QUERIES = 192;  // of a tile
constexpr int64_t TASKS = 32;          // at least, where there are few tiles: then the keys are split

void check_ids(const char* name, const Tensor& ids, int64_t rows) {
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.size(0) == rows && ids.scalar_type() == at::kLong, OP, ": ", name,
                    " must be int64 of shape [", rows, "], got ", ids.scalar_type(), " of shape ", ids.sizes());
}

// The members of ``index`` as 32 bits that are equal where the ids are: a vector holds as many of them as floats.
struct Numbers {
  std::vector<int32_t> query, key;
  Numbers(const int64_t* q, const std::vector<int64_t>& q_index, int64_t padded, const int64_t* k,
          const std::vector<int64_t>& k_index)
      : query(padded), key(k_index.size()) {
    const auto narrow = [](int64_t v) { return v == (int32_t)v; };
    const bool fits = std::all_of(q_index.begin(), q_index.end(), [&](int64_t i) { return narrow(q[i]); }) &&
                      std::all_of(k_index.begin(), k_index.end(), [&](int64_t i) { return narrow(k[i]); });
    std::vector<int64_t> known;
    if (!fits) {
      for (const int64_t i : k_index) known.push_back(k[i]);
      std::sort(known.begin(), known.end());
      known.erase(std::unique(known.begin(), known.end()), known.end());
    }
    const auto number = [&](int64_t v) {
      if (fits) return (int32_t)v;
      const auto found = std::lower_bound(known.begin(), known.end(), v);
      return found != known.end() && *found == v ? (int32_t)(found - known.begin()) : -1;
    };
    for (size_t i = 0; i < q_index.size(); ++i) query[i] = number(q[q_index[i]]);
    for (size_t i = 0; i < k_index.size(); ++i) key[i] = number(k[k_index[i]]);
  }
};

struct Setup {
  Pairs pairs{};
  int64_t span = 0;  // queries of all tiles
  Tensor x, k;

  // Of the queries only those that ``wanted`` (a function of the row) says; ``panels``: for the gradient of the keys.
  template <class F>
  Setup(const Tensor& input, const Tensor& keys, const Tensor& ids, const Tensor& key_ids, Optional instance,
        Optional key_instance, int64_t private_keys, int64_t ignore_index, bool panels, F wanted) {
    TORCH_CHECK_VALUE(input.dim() == 2 && keys.dim() == 2 && input.size(1) == keys.size(1), OP,
                      ": input and keys must be [N, D] and [M, D], got ", input.sizes(), " and ", keys.sizes());
    TORCH_CHECK_VALUE(keys.size(0) < INT32_MAX, OP, ": keys must be fewer than 2^31 - 1, got ", keys.size(0));
    TORCH_CHECK_VALUE(instance.has_value() == key_instance.has_value(), OP,
                      ": instance and key_instance must be given together");
    check_ids("ids", ids, input.size(0)), check_ids("key_ids", key_ids, keys.size(0));
    if (instance) {
      check_ids("instance", *instance, input.size(0));
      check_ids("key_instance", *key_instance, keys.size(0));
    }
    x = adjacent(input), k = adjacent(keys);
    pairs.query.rows = matrix(OP, x), pairs.key.rows = matrix(OP, k);
    const Tensor id = ids.contiguous(), key_id = key_ids.contiguous();
    const int64_t *q = id.const_data_ptr<int64_t>(), *m = key_id.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < x.size(0); ++n)
      if (q[n] != ignore_index && wanted(n)) query_index.push_back(n);
    for (int64_t i = 0; i < k.size(0); ++i)
      if (m[i] != ignore_index) key_index.push_back(i);
    pairs.private_keys = counted_below(private_keys);
    pairs.D = x.size(1), pairs.Dp = std::max<int64_t>((pairs.D + 63) / 64 * 64, 64);
    const int64_t N = (int64_t)query_index.size(), M = (int64_t)key_index.size();
    pairs.query.count = N, pairs.key.count = M;
    pairs.query.index = query_index.data(), pairs.key.index = key_index.data();
    // A block of keys, a tile of queries and their cosines stay in L2.
    pairs.R = pairs.D <= 512 ? MOST_QUERIES : pairs.D <= 1024 ? MOST_QUERIES / 2 : 48;
    pairs.R = std::min(pairs.R, (std::max<int64_t>(N, 1) + 47) / 48 * 48);
    pairs.K = std::clamp<int64_t>(32768 / pairs.Dp / 32 * 32, 32, 128);
    pairs.tiles = (N + pairs.R - 1) / pairs.R, pairs.blocks = (M + pairs.K - 1) / pairs.K;
    span = pairs.tiles * pairs.R;
    id_numbers.emplace(q, query_index, span, m, key_index);
    pairs.query.id = id_numbers->query.data(), pairs.key.id = id_numbers->key.data();
    if (instance) {
      const Tensor own = instance->contiguous(), other = key_instance->contiguous();
      const int64_t *mine = own.const_data_ptr<int64_t>(), *theirs = other.const_data_ptr<int64_t>();
      instance_numbers.emplace(mine, query_index, span, theirs, key_index);
      pairs.query.instance = instance_numbers->query.data(), pairs.key.instance = instance_numbers->key.data();
    } else {  // never equal
      apart.assign(span + M, 0);
      std::fill(apart.begin() + span, apart.end(), 1);
      pairs.query.instance = apart.data(), pairs.key.instance = apart.data() + span;
    }
    pack(panels);
  }

  // How many of the keys that count are among the first ``keys``.
  int64_t counted_below(int64_t keys) const {
    return std::lower_bound(key_index.begin(), key_index.end(), keys) - key_index.begin();
  }

  // Into how many tasks the keys of a tile are split: a function of the sizes alone.
  int64_t splits(int64_t blocks, int64_t least) const {
    return std::clamp<int64_t>((TASKS + pairs.tiles - 1) / std::max<int64_t>(pairs.tiles, 1), 1,
                               std::max<int64_t>(blocks / least, 1));
  }

 private:
  std::vector<int64_t> query_index, key_index;
  std::optional<Numbers> id_numbers, instance_numbers;
  std::vector<int32_t> apart;
  Tensor inverse, packed;

  void pack(bool panels) {
    const int64_t N = pairs.query.count, M = pairs.key.count, Dp = pairs.Dp, queries = span * Dp;
    inverse = at::empty({N + M}, at::kFloat);
    packed = at::empty({(panels ? 2 : 1) * queries + pairs.blocks * pairs.K * Dp}, at::kFloat);
    float* at = packed.mutable_data_ptr<float>();
    pairs.queries = std::exchange(at, at + queries);
    if (panels) pairs.query_panels = std::exchange(at, at + queries);
    pairs.keys = at;
    pairs.query.inverse = inverse.const_data_ptr<float>(), pairs.key.inverse = pairs.query.inverse + N;
    fastrex::parallel_for(0, pairs.tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(16 * Dp);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t n0 = pairs.row(tile);
        FASTREX_DISPATCH(norms, pairs.query, pairs.D, n0, n0 + pairs.rows(tile));
        FASTREX_DISPATCH(pack_queries, pairs, tile, scratch.data());
      }
    });
    fastrex::parallel_for(0, pairs.blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * pairs.K;
        FASTREX_DISPATCH(norms, pairs.key, pairs.D, c0, c0 + pairs.keys_of(block));
        FASTREX_DISPATCH(pack_keys, pairs, block);
      }
    });
  }
};

// Runs f(task, scratch of this thread) for all tasks.
template <class F>
void each(int64_t tasks, int64_t floats, F f) {
  if (tasks == 0) return;
  const Tensor scratch = at::empty({fastrex::num_threads(), floats}, at::kFloat);
  fastrex::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    float* own = scratch.mutable_data_ptr<float>() + at::get_thread_num() * floats;
    for (int64_t task = begin; task < end; ++task) f(task, own);
  });
}

}  // namespace
