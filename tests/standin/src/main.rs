//! The `pct` stand-in; installed a second time as `pvesm`.

use std::process::ExitCode;

fn main() -> ExitCode {
    standin::run_program()
}
