#include "cpp/check.h"

int main() { return effops::test::run_all_tests(); }
