// SPDX-License-Identifier: Apache-2.0
// Makes the tables of csrc/cuda/launch.h and runs steps over them on the CPU (cuda_on_cpu.h). Reads
// a case from the standard input and writes what the memory holds afterwards to the standard
// output; tests/cuda_cases.py is the other end. Exits with 3 and a message where a launch was
// wrong.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace {

using namespace pyupdate;
using cuda::Bucket;
using cuda::Tables;

void get_bytes(void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(4);
}
template <class T>
T get() {
  T value;
  get_bytes(&value, sizeof value);
  return value;
}
void put_bytes(const void* from, size_t bytes) {
  if (bytes != 0 && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(4);
}
template <class T>
void put(T value) {
  put_bytes(&value, sizeof value);
}

[[noreturn]] void wrong(const std::string& what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what.c_str());
  std::exit(3);
}

// Memory of a tensor, `shift` bytes behind an address of 16 bytes. AddressSanitizer watches both of
// its ends; where it does not, guard bytes do.
class Buffer {
 public:
  Buffer(size_t bytes, size_t shift) : bytes_(bytes), shift_(kGuard + shift) {
    memory_.reset(static_cast<char*>(std::malloc(shift_ + bytes + kGuard)));
    std::memset(memory_.get(), kPattern, shift_ + bytes + kGuard);
  }
  char* data() const { return memory_.get() + shift_; }
  size_t bytes() const { return bytes_; }
  int64_t address() const { return reinterpret_cast<int64_t>(data()); }
  void read() { get_bytes(data(), bytes_); }
  void check() const {
    for (size_t i = 0; i < shift_ + bytes_ + kGuard; ++i) {
      if (i >= shift_ && i < shift_ + bytes_) continue;
      if (memory_.get()[i] != kPattern) wrong("a byte outside of a tensor was written");
    }
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  static constexpr char kPattern = 0x5a;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  size_t bytes_, shift_;
  std::unique_ptr<char, Free> memory_;
};

constexpr size_t kParamBytes[] = {8, 4, 2, 2, 2, 2};
constexpr size_t kStateBytes[] = {8, 4, 2, 2, 4, 4};
constexpr size_t kComputeBytes[] = {8, 4, 4, 4, 4, 4};

// One row's memory besides its gradient.
struct Tensors {
  std::vector<Buffer> roles;  // parameter, states, average
  std::unique_ptr<Buffer> step;
  std::vector<Buffer> scalars;
};

// A member of the step, and the numbers that stand in memory of their own.
struct Asked {
  cuda::Member member{};
  int64_t stochastic;
  std::unique_ptr<float> scale, found;

  Asked() {
    cuda::Request& request = member.request;
    member.rows_end = get<int64_t>();
    request.reduce = static_cast<int32_t>(get<int64_t>());
    request.skip_nonfinite = static_cast<int32_t>(get<int64_t>());
    request.finite_norm = static_cast<int32_t>(get<int64_t>());
    request.inf_norm = static_cast<int32_t>(get<int64_t>());
    stochastic = get<int64_t>();
    request.seed = get<int64_t>();
    request.unscale = get<double>();
    scale = std::make_unique<float>(static_cast<float>(get<double>()));
    if (*scale != 0.0f) request.scale = scale.get();
    found = std::make_unique<float>(static_cast<float>(get<double>()));
    if (*found != 0.0f) request.found_inf = found.get();
    request.max_norm = get<double>();
    request.clip_value = get<double>();
    request.ema_weight = get<double>();
  }
};

void run() {
  cuda_on_cpu::order = static_cast<unsigned>(get<int64_t>());
  const auto blocks = static_cast<int>(get<int64_t>());
  const auto steps = get<int64_t>();
  Tables tables{};
  tables.averages = get<int64_t>();
  tables.hyper_count = get<int64_t>();
  tables.row_count = get<int64_t>();
  const auto apart = get<int64_t>();  // finish by a launch of its own
  tables.member_count = get<int64_t>();
  const std::vector<Asked> asked(static_cast<size_t>(tables.member_count));
  std::vector<cuda::Member> members;
  for (const Asked& one : asked) members.push_back(one.member);
  cuda::Request request = members[0].request;
  if (members.size() > 1) {
    tables.members = members.data();
    request = {};
    for (const cuda::Member& member : members) request.reduce |= member.request.reduce;
  }
  const int64_t stochastic = asked[0].stochastic;

  // Hyper rows and their numbers; a number may stand in a tensor.
  std::vector<HyperRow> hyper_rows;
  std::vector<cuda::HyperSource> sources;
  std::vector<double> numbers;
  std::vector<int64_t> number_at;
  std::vector<std::unique_ptr<double>> in_tensors;
  int64_t hypers = 0;
  int64_t states = 0;
  for (int64_t h = 0; h < tables.hyper_count; ++h) {
    HyperRow hyper{};
    hyper.rule = get<int64_t>();
    hyper.storage = get<int64_t>();
    hyper.offset = hypers;
    hyper.step = get<int64_t>();
    hyper.member = get<int64_t>();
    hyper.sign = get<double>();
    const auto in_tensor = get<int64_t>();  // index of the number that does, or -1
    const cuda::RuleInfo& rule = cuda::rule_info(static_cast<int>(hyper.rule));
    sources.push_back({-1, static_cast<int64_t>(numbers.size())});
    for (int64_t k = 0; k < rule.numbers - 1; ++k) {
      const auto number = get<double>();
      in_tensors.push_back(std::make_unique<double>(number));
      const auto at = reinterpret_cast<int64_t>(in_tensors.back().get()) + 1;
      numbers.push_back(k == in_tensor ? -1.0 : number);
      number_at.push_back(k == in_tensor ? at : 0);
    }
    hypers += rule.hypers + rule.counted;
    states = std::max<int64_t>(states, rule.states);
    tables.per_tensor = std::max<int64_t>(tables.per_tensor, rule.per_tensor);
    tables.scalars_width = std::max<int64_t>(tables.scalars_width, rule.scalars);
    hyper_rows.push_back(hyper);
  }
  tables.width = kFirstState + states + (tables.averages != 0 ? 1 : 0);

  // Rows, in plan order.
  std::vector<Row> rows;
  std::vector<Tensors> tensors(static_cast<size_t>(tables.row_count));
  std::vector<int64_t> addresses, scalars, identities, shifts;
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> buckets;
  for (int64_t r = 0; r < tables.row_count; ++r) {
    Tensors& own = tensors[static_cast<size_t>(r)];
    Row row{};
    row.hyper = static_cast<int32_t>(get<int64_t>());
    row.size = get<int64_t>();
    row.chunk = tables.chunks;
    row.layout = -1;
    tables.chunks += cuda::chunks_of(row.size);
    const HyperRow& hyper = hyper_rows[static_cast<size_t>(row.hyper)];
    const cuda::RuleInfo& rule = cuda::rule_info(static_cast<int>(hyper.rule));
    shifts.push_back(get<int64_t>());  // in elements
    const auto step_bytes = get<int64_t>();
    identities.push_back(get<int64_t>());
    const auto count = get<double>();
    if (step_bytes != 0) {
      own.step = std::make_unique<Buffer>(step_bytes, 0);
      row.step = own.step->address() + (step_bytes == 8 ? 1 : 0);
      const auto narrow = static_cast<float>(count);
      if (step_bytes == 8) {
        std::memcpy(own.step->data(), &count, 8);
      } else {
        std::memcpy(own.step->data(), &narrow, 4);
      }
    }
    std::vector<int64_t> address(static_cast<size_t>(tables.width));
    const auto add = [&](int64_t role, size_t itemsize) {
      own.roles.emplace_back(static_cast<size_t>(row.size) * itemsize,
                             static_cast<size_t>(shifts.back()) * itemsize);
      own.roles.back().read();
      address[static_cast<size_t>(role)] = own.roles.back().address();
    };
    add(kParam, kParamBytes[hyper.storage]);
    for (int64_t k = 0; k < rule.states; ++k) add(kFirstState + k, kStateBytes[hyper.storage]);
    if (tables.averages != 0) add(tables.width - 1, kComputeBytes[hyper.storage]);
    addresses.insert(addresses.end(), address.begin(), address.end());
    for (int64_t k = 0; k < tables.scalars_width; ++k) {
      int64_t at = 0;
      if (k < rule.scalars) {
        own.scalars.emplace_back(4, 0);
        own.scalars.back().read();
        at = own.scalars.back().address();
      }
      scalars.push_back(at);
    }
    cuda::HyperSource& source = sources[static_cast<size_t>(row.hyper)];
    if (source.row < 0) source.row = r;
    for (int64_t chunk = 0; chunk < cuda::chunks_of(row.size); ++chunk) {
      buckets[{hyper.rule, hyper.storage}].push_back(r << 32 | chunk);
    }
    rows.push_back(row);
  }
  std::vector<int64_t> items;
  std::vector<Bucket> cut;
  for (const auto& [key, own] : buckets) {
    const auto begin = static_cast<int64_t>(items.size());
    items.insert(items.end(), own.begin(), own.end());
    cut.push_back({static_cast<int32_t>(key.first), static_cast<int32_t>(key.second), begin,
                   static_cast<int64_t>(items.size())});
  }

  const auto row_count = static_cast<size_t>(tables.row_count);
  const auto per_tensor = static_cast<size_t>(tables.per_tensor);
  std::vector<double> hyper_table(static_cast<size_t>(hypers));
  std::vector<double> chunk_sums(static_cast<size_t>(tables.chunks) *
                                 std::max<size_t>(1, per_tensor));
  std::vector<double> grad_sums(row_count), row_sums(row_count * per_tensor);
  std::vector<uint32_t> row_tickets(row_count), tickets(1 + members.size());
  std::vector<Control> control(members.size());
  std::vector<cuda::Outcome> outcomes(members.size());
  tables.rows = rows.data();
  tables.addresses = addresses.data();
  tables.scalars = scalars.data();
  tables.items = items.data();
  tables.hyper_rows = hyper_rows.data();
  tables.sources = sources.data();
  tables.numbers = numbers.data();
  tables.number_at = number_at.data();
  tables.identities = stochastic != 0 ? identities.data() : nullptr;
  tables.hypers = hyper_table.data();
  tables.chunk_sums = chunk_sums.data();
  tables.grad_sums = grad_sums.data();
  tables.row_sums = row_sums.data();
  tables.row_tickets = row_tickets.data();
  tables.tickets = tickets.data();
  tables.control = control.data();
  tables.outcome = outcomes.data();

  for (int64_t step = 0; step < steps; ++step) {
    std::vector<Buffer> grads;
    for (size_t r = 0; r < row_count; ++r) {
      const auto bytes = kParamBytes[hyper_rows[static_cast<size_t>(rows[r].hyper)].storage];
      grads.emplace_back(static_cast<size_t>(rows[r].size) * bytes,
                         static_cast<size_t>(shifts[r]) * bytes);
      grads.back().read();
      addresses[r * static_cast<size_t>(tables.width) + kGrad] = grads.back().address();
    }
    if (apart != 0) {
      cuda::Request open = request;
      open.leave_open = 1;
      cuda::reduce(tables, open, static_cast<int64_t>(items.size()), blocks, nullptr);
      std::vector<double> parts = grad_sums;
      cuda::finish(tables, request, parts.data(), tables.row_count, &tickets[1], nullptr);
    } else {
      cuda::reduce(tables, request, static_cast<int64_t>(items.size()), blocks, nullptr);
    }
    for (const Bucket& bucket : cut) {
      for (int stage = 0; stage < cuda::rule_info(bucket.rule).stages; ++stage) {
        cuda::apply(tables, bucket, stage, request.reduce != 0, blocks, nullptr);
      }
    }
    for (const cuda::Outcome& outcome : outcomes) {
      put(outcome.norm);
      put(outcome.multiplier);
      put(static_cast<double>(outcome.found_inf));
      put(static_cast<double>(outcome.skipped));
    }
    for (const Buffer& grad : grads) grad.check();
    for (uint32_t ticket : row_tickets) {
      if (ticket != 0) wrong("a row's ticket was left");
    }
    for (uint32_t ticket : tickets) {
      if (ticket != 0) wrong("a ticket was left");
    }
  }
  for (const Tensors& own : tensors) {
    for (const Buffer& role : own.roles) {
      role.check();
      put_bytes(role.data(), role.bytes());
    }
    if (own.step) {
      own.step->check();
      put_bytes(own.step->data(), own.step->bytes());
    }
    for (const Buffer& scalar : own.scalars) put_bytes(scalar.data(), scalar.bytes());
  }
  for (const HyperRow& hyper : hyper_rows) put(hyper.step);
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    wrong(error.what());
  }
  return 0;
}
