// SPDX-License-Identifier: Apache-2.0
// Steps the first and the last chunk of a row of more than 2^31 elements on the CPU: memory that is
// reserved and not touched costs nothing. Exits with 0 where both were stepped and nothing else
// was.
#include <sys/mman.h>

#include <cstdio>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace {

using namespace pyupdate;

constexpr int64_t kSize = (int64_t{1} << 31) + 5000;

float* reserved() {
  void* memory = mmap(nullptr, kSize * sizeof(float), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::exit(77);
  return static_cast<float*>(memory);
}

int failed(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  return 1;
}

}  // namespace

// The rule is SGD, the first that is compiled: numbers lr, momentum, ...; here lr alone is not 0.
int main() {
  float* param = reserved();
  float* grad = reserved();
  const int64_t last = (kSize - 1) / kChunk * kChunk;
  for (int64_t begin : {int64_t{0}, last}) {
    for (int64_t i = begin; i < begin + kChunk && i < kSize; ++i) grad[i] = 1.0f;
  }
  const cuda::RuleInfo& rule = cuda::rule_info(0);
  std::vector<double> numbers(static_cast<size_t>(rule.numbers));
  std::vector<int64_t> number_at(numbers.size());
  numbers[0] = 0.5;
  HyperRow hyper{};
  hyper.storage = 1;
  hyper.sign = 1.0;
  const cuda::HyperSource source{0, 0};
  const Row row{kSize, 0, 0, 0, -1};
  const int64_t addresses[] = {reinterpret_cast<int64_t>(param), reinterpret_cast<int64_t>(grad)};
  const int64_t items[] = {0, last / kChunk};
  std::vector<double> hypers(static_cast<size_t>(rule.hypers));
  uint32_t row_ticket = 0, tickets[2] = {};
  Control control{};
  cuda::Outcome outcome{};
  cuda::Tables tables{};
  tables.rows = &row;
  tables.addresses = addresses;
  tables.items = items;
  tables.hyper_rows = &hyper;
  tables.sources = &source;
  tables.numbers = numbers.data();
  tables.number_at = number_at.data();
  tables.hypers = hypers.data();
  tables.row_tickets = &row_ticket;
  tables.tickets = tickets;
  tables.control = &control;
  tables.outcome = &outcome;
  tables.row_count = tables.hyper_count = tables.member_count = 1;
  tables.width = 2;
  tables.chunks = cuda::chunks_of(kSize);
  cuda::reduce(tables, cuda::Request{}, 0, 4, nullptr);
  cuda::apply(tables, {0, 1, 0, 2}, 0, false, 4, nullptr);
  if (param[0] != -0.5f || param[kChunk - 1] != -0.5f) return failed("the first chunk");
  if (param[last] != -0.5f || param[kSize - 1] != -0.5f) return failed("the last chunk");
  if (param[kChunk] != 0.0f || param[last - 1] != 0.0f) return failed("another chunk");
  return 0;
}
