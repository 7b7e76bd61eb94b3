// Integers that follow from the sizes of packed images; the maths is in patchpack.metadata and
// patchpack.packing. Sizes that cannot be, or a length that is not theirs, are refused here: the
// code over there, for any device, then knows what to say or what to do.
#include "integers.h"

namespace patchpack {
namespace {

struct Grid {
  int64_t frames, rows, cols, merge;

  int64_t num_tokens() const { return frames * rows * cols; }
};

// Grids that can be, whole in blocks.
struct Grids : std::vector<Grid> {
  int64_t num_tokens = 0, num_frames = 0;

  void add(const Grid& g) {
    STD_TORCH_CHECK(std::min({g.frames, g.rows, g.cols, g.merge}) >= 1, "a size is below 1");
    STD_TORCH_CHECK(g.rows % g.merge == 0 && g.cols % g.merge == 0, "blocks are not whole");
    // counts exactly to far beyond 2**31, and does not wrap around
    const double tokens_here = (double)g.frames * (double)g.rows * (double)g.cols;
    STD_TORCH_CHECK((double)num_tokens + tokens_here < 2147483648.0, "2**31 tokens or more");
    push_back(g);
    num_tokens += g.num_tokens();
    num_frames += g.frames;
  }
};

// Sizes `[G, 3]`, in blocks of `merge` tokens, or of one of `merges` each.
Grids grids_of(const Tensor& grid_thw, int64_t merge,
               const std::optional<Tensor>& merges = std::nullopt) {
  const Tensor sizes_tensor = all_contiguous(grid_thw);
  const Tensor merges_tensor = all_contiguous(merges.value_or(grid_thw));
  const Integers sizes(sizes_tensor), each(merges_tensor);
  Grids grids;
  grids.reserve(sizes_tensor.size(0));
  for (int64_t i = 0; i < sizes_tensor.size(0); ++i)
    grids.add({sizes[3 * i], sizes[3 * i + 1], sizes[3 * i + 2], merges ? each[i] : merge});
  return grids;
}

void check_length(std::optional<int64_t> asked, int64_t length) {
  STD_TORCH_CHECK(asked.value_or(length) == length, "the sizes say another length");
}

Tensor cu_seqlens_of(const Grids& grids, bool merge_temporal) {
  const int64_t num_segments = merge_temporal ? (int64_t)grids.size() : grids.num_frames;
  const Tensor cu_seqlens = empty({num_segments + 1}, ScalarType::Int);
  int32_t* out = cu_seqlens.mutable_data_ptr<int32_t>();
  int64_t end = 0;
  *out++ = 0;
  for (const Grid& g : grids) {
    const int64_t num_segments_here = merge_temporal ? 1 : g.frames;
    for (int64_t i = 0; i < num_segments_here; ++i)
      *out++ = (int32_t)(end += g.num_tokens() / num_segments_here);
  }
  return cu_seqlens;
}

}  // namespace
}  // namespace patchpack

#define KERNELS "metadata.h"
#include "foreach_level.h"

namespace patchpack {

namespace {

Tensor sizes_of(const Grids& grids) {
  const Tensor sizes = empty({(int64_t)grids.size(), 3}, ScalarType::Long);
  int64_t* out = sizes.mutable_data_ptr<int64_t>();
  for (const Grid& g : grids)
    for (const int64_t size : {g.frames, g.rows, g.cols}) *out++ = size;
  return sizes;
}

// The fields of a PackedGrid: sizes to trust and sizes to look at, geometry, segments, tokens, and
// tokens of the longest segment.
using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t>;

Packed packed(const Grids& grids, bool merge_temporal) {
  const Tensor geometry = empty({(int64_t)grids.size() + 1, 3}, ScalarType::Long);
  int64_t* row = geometry.mutable_data_ptr<int64_t>();
  int64_t first = 0, longest = 0;
  for (const Grid& g : grids) {
    *row++ = first;
    *row++ = g.rows;
    *row++ = g.cols;
    first += g.num_tokens();
    longest = std::max(longest, merge_temporal ? g.num_tokens() : g.rows * g.cols);
  }
  *row++ = first;
  *row++ = 1;
  *row++ = 1;
  return {sizes_of(grids), sizes_of(grids), geometry, cu_seqlens_of(grids, merge_temporal),
          grids.num_tokens, longest};
}

}  // namespace

Packed packed_grid(Tensor sizes, int64_t merge, bool merge_temporal) {
  return packed(grids_of(sizes, merge), merge_temporal);
}

// Rows and columns become those of `target_hw` `[2 * G]`.
Packed resized_grid(Tensor sizes, std::vector<int64_t> target_hw, int64_t merge,
                    bool merge_temporal) {
  Grids resized;
  const Grids grids = grids_of(sizes, 1);
  STD_TORCH_CHECK(target_hw.size() == 2 * grids.size(), "a target for each grid");
  const int64_t* target = target_hw.data();
  for (const Grid& g : grids) {
    resized.add({g.frames, target[0], target[1], merge});
    target += 2;
  }
  return packed(resized, merge_temporal);
}

std::tuple<Tensor, int64_t> merged_grid(Tensor sizes, int64_t merge) {
  Grids merged;
  for (const Grid& g : grids_of(sizes, merge))
    merged.add({g.frames, g.rows / merge, g.cols / merge, 1});
  return {sizes_of(merged), merged.num_tokens};
}

Tensor vision_cu_seqlens(Tensor grid_thw, bool merge_temporal,
                         std::optional<int64_t> num_segments) {
  const Grids grids = grids_of(grid_thw, 1);
  if (!merge_temporal) check_length(num_segments, grids.num_frames);
  return cu_seqlens_of(grids, merge_temporal);
}

Tensor vision_position_ids(Tensor grid_thw, int64_t merge, std::optional<Tensor> merges,
                           bool include_temporal, std::optional<int64_t> num_tokens) {
  const Grids grids = grids_of(grid_thw, merge, merges);
  check_length(num_tokens, grids.num_tokens);
  const Tensor position_ids = empty({grids.num_tokens, include_temporal ? 3 : 2}, ScalarType::Long);
  AT_LEVEL(fill_position_ids(grids, include_temporal, position_ids.mutable_data_ptr<int64_t>()));
  return position_ids;
}

std::tuple<Tensor, Tensor> vision_window_index(Tensor grid_thw, int64_t merge, int64_t side,
                                               std::optional<int64_t> num_tokens,
                                               std::optional<int64_t> num_windows) {
  Grids grids = grids_of(grid_thw, merge);
  int64_t windows = 0;
  for (Grid& g : grids) {
    g.rows /= merge;
    g.cols /= merge;
    windows += g.frames * ((g.rows - 1) / side + 1) * ((g.cols - 1) / side + 1);
  }
  check_length(num_tokens, grids.num_tokens);
  check_length(num_windows, windows);

  const Tensor window_index = empty({grids.num_tokens / (merge * merge)}, ScalarType::Long);
  const Tensor cu_window_seqlens = empty({windows + 1}, ScalarType::Int);
  int64_t* index = window_index.mutable_data_ptr<int64_t>();
  int32_t* bound = cu_window_seqlens.mutable_data_ptr<int32_t>();
  const int64_t* begin = index;
  int64_t first = 0;
  *bound++ = 0;
  for (const Grid& g : grids)
    for (int64_t frame = 0; frame < g.frames; ++frame, first += g.rows * g.cols)
      for (int64_t top = 0; top < g.rows; top += side)
        for (int64_t left = 0; left < g.cols; left += side) {
          const int64_t bottom = std::min(top + side, g.rows);
          const int64_t right = std::min(left + side, g.cols);
          for (int64_t row = top; row < bottom; ++row)
            for (int64_t col = left; col < right; ++col) *index++ = first + row * g.cols + col;
          *bound++ = (int32_t)((index - begin) * merge * merge);
        }
  return {window_index, cu_window_seqlens};
}

namespace {

// An image, a video or a frame of one, as its run of tokens counts it.
struct Run {
  int64_t frames = 1, rows = 1, cols = 1;
  std::optional<double> seconds = {};  // from one frame to the next, where they count
};

// Grids `[G, 3]` in tokens of `merge` patches a side; what is below 1 becomes 1.
std::vector<Run> runs_of(const std::optional<Tensor>& grid_thw, int64_t merge) {
  std::vector<Run> runs;
  if (!grid_thw) return runs;
  const Tensor sizes_tensor = all_contiguous(*grid_thw);
  const Integers sizes(sizes_tensor);
  for (int64_t i = 0; i < 3 * sizes_tensor.size(0); i += 3)
    runs.push_back({std::max<int64_t>(sizes[i], 1), std::max<int64_t>(sizes[i + 1] / merge, 1),
                    std::max<int64_t>(sizes[i + 2] / merge, 1)});
  return runs;
}

std::vector<Run> split_into_frames(const std::vector<Run>& runs, int64_t most) {
  std::vector<Run> frames;
  for (const Run& run : runs)
    for (int64_t i = 0; i < run.frames && (int64_t)frames.size() < most; ++i)
      frames.push_back({1, run.rows, run.cols, run.seconds});
  return frames;
}

// Where samples begin, and the last ends: as given, or those of a batch; within the tokens.
std::vector<int64_t> bounds_of(const Tensor& input_ids, const std::optional<Tensor>& cu_seqlens) {
  const int64_t batch = input_ids.dim() == 2 ? input_ids.size(0) : 1;
  const int64_t length = input_ids.size(input_ids.dim() - 1);
  std::vector<int64_t> bounds;
  if (cu_seqlens) {
    const Tensor given_tensor = all_contiguous(*cu_seqlens);
    const Integers given(given_tensor);
    for (int64_t i = 0; i < given_tensor.size(0); ++i)
      bounds.push_back(std::clamp<int64_t>(given[i], 0, length));
  } else {
    for (int64_t i = 0; i <= batch; ++i) bounds.push_back(i * length);
  }
  return bounds;
}

// `frame * seconds * tokens_per_second` in the dtype of the seconds, toward zero.
template <typename real_t>
int64_t scaled_time(int64_t frame, double seconds, double tokens_per_second) {
  const real_t time = (real_t)frame * (real_t)seconds * (real_t)tokens_per_second;
  return std::abs(time) < (real_t)9223372036854775808.0 ? (int64_t)time : INT64_MIN;
}

}  // namespace

std::tuple<Tensor, Tensor> mrope_position_ids(
    Tensor input_ids, std::optional<Tensor> image_grid_thw, std::optional<Tensor> video_grid_thw,
    std::optional<Tensor> attention_mask, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> second_per_grid_ts, std::optional<int64_t> vision_start, int64_t image_id,
    int64_t video_id, double tokens_per_second, bool split_frames, bool frames_advance,
    int64_t merge) {
  std::vector<Run> images = runs_of(image_grid_thw, merge);
  std::vector<Run> videos = runs_of(video_grid_thw, merge);
  if (second_per_grid_ts || tokens_per_second != 1)
    for (Run& run : videos) run.seconds = 1;
  bool is_double = false;
  if (second_per_grid_ts) {
    const Tensor seconds = all_contiguous(*second_per_grid_ts);
    is_double = seconds.scalar_type() == ScalarType::Double;
    for (size_t i = 0; i < videos.size(); ++i)
      videos[i].seconds =
          is_double ? seconds.const_data_ptr<double>()[i] : seconds.const_data_ptr<float>()[i];
  }
  const auto time_of = [&](const Run& run, int64_t frame) {
    if (!run.seconds) return frame;
    const auto scaled = is_double ? scaled_time<double> : scaled_time<float>;
    return scaled(frame, *run.seconds, tokens_per_second);
  };
  if (split_frames) videos = split_into_frames(videos, input_ids.numel());

  const Tensor ids_tensor = all_contiguous(input_ids);
  const Integers ids(ids_tensor);
  std::optional<Tensor> mask;
  if (attention_mask) mask = all_contiguous(torch::stable::to(*attention_mask, ScalarType::Bool));
  const bool* valid = mask ? mask->const_data_ptr<bool>() : nullptr;

  std::vector<int64_t> sizes(input_ids.sizes().begin(), input_ids.sizes().end());
  sizes.insert(sizes.begin(), 3);
  const std::vector<int64_t> bounds = bounds_of(input_ids, cu_seqlens);
  const int64_t num_samples = bounds.size() - 1, num_tokens = input_ids.numel();
  const Tensor position_ids = empty(sizes, ScalarType::Long);
  const Tensor deltas = empty({num_samples, 1}, ScalarType::Long);
  int64_t* out = position_ids.mutable_data_ptr<int64_t>();
  const auto put = [&](int64_t token, uint64_t t, uint64_t h, uint64_t w) {  // may wrap around
    out[token] = t;
    out[num_tokens + token] = h;
    out[2 * num_tokens + token] = w;
  };

  size_t num_images = 0, num_videos = 0;  // begun so far
  int64_t token = 0;
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    bool starts = false;
    int64_t kind = -1;  // of the token before: that of an image, of a video, or neither
    uint64_t next = 0, base = 0;
    int64_t t = 0, frame = 0, row = 0, col = 0;
    Run run;
    for (; token < bounds[sample + 1]; ++token) {
      if (valid && !valid[token]) {
        put(token, 1, 1, 1);
        continue;
      }
      const int64_t id = ids[token];
      const bool is_image = id == image_id, is_video = id == video_id;
      if (!is_image && !is_video) {
        put(token, next, next, next);
        ++next;
        starts = id == vision_start;
        kind = -1;
        continue;
      }
      if (!vision_start) starts = id != kind;
      kind = id;
      if (starts) {
        starts = false;
        size_t& begun = is_image ? num_images : num_videos;
        const std::vector<Run>& runs = is_image ? images : videos;
        run = begun < runs.size() ? runs[begun++] : Run{};
        base = next;
        const int64_t frames = frames_advance ? time_of(run, run.frames - 1) + 1 : 1;
        next += std::max({frames, run.rows, run.cols});
        frame = t = row = col = 0;
      } else if (++col == run.cols) {
        col = 0;
        if (++row == run.rows) {
          row = 0;
          t = time_of(run, ++frame);
        }
      }
      put(token, base + t, base + row, base + col);
    }
    deltas.mutable_data_ptr<int64_t>()[sample] = next - (bounds[sample + 1] - bounds[sample]);
  }
  for (; token < num_tokens; ++token) put(token, 1, 1, 1);
  return {position_ids, deltas};
}

STABLE_TORCH_LIBRARY_FRAGMENT(patchpack, library) {
  library.def(
      "packed_grid(Tensor sizes, int merge, bool merge_temporal)"
      " -> (Tensor, Tensor, Tensor, Tensor, int, int)");
  library.def(
      "resized_grid(Tensor sizes, int[] target_hw, int merge, bool merge_temporal)"
      " -> (Tensor, Tensor, Tensor, Tensor, int, int)");
  library.def("merged_grid(Tensor sizes, int merge) -> (Tensor, int)");
  library.def(
      "vision_cu_seqlens(Tensor grid_thw, bool merge_temporal, int? num_segments) -> Tensor");
  library.def(
      "vision_position_ids(Tensor grid_thw, int merge, Tensor? merges, bool include_temporal,"
      " int? num_tokens) -> Tensor");
  library.def(
      "vision_window_index(Tensor grid_thw, int merge, int side, int? num_tokens,"
      " int? num_windows) -> (Tensor, Tensor)");
  library.def(
      "mrope_position_ids(Tensor input_ids, Tensor? image_grid_thw, Tensor? video_grid_thw,"
      " Tensor? attention_mask, Tensor? cu_seqlens, Tensor? second_per_grid_ts, int? vision_start,"
      " int image_id, int video_id, float tokens_per_second, bool split_frames,"
      " bool frames_advance, int merge) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("packed_grid", TORCH_BOX(&packed_grid));
  library.impl("resized_grid", TORCH_BOX(&resized_grid));
  library.impl("merged_grid", TORCH_BOX(&merged_grid));
  library.impl("vision_cu_seqlens", TORCH_BOX(&vision_cu_seqlens));
  library.impl("vision_position_ids", TORCH_BOX(&vision_position_ids));
  library.impl("vision_window_index", TORCH_BOX(&vision_window_index));
  library.impl("mrope_position_ids", TORCH_BOX(&mrope_position_ids));
}

}  // namespace patchpack
