//! Builds the helper, which runs inside of sandboxes and so must not need anything of theirs: one
//! static executable. It becomes part of the agent (`sys::image`), so that the two always fit.

#![expect(
    clippy::disallowed_methods,
    reason = "cargo tells a build script so, and only so; the helper is built by cargo"
)]

use std::{env, fs, path::PathBuf, process::Command};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=helper/Cargo.toml");
    println!("cargo:rerun-if-changed=../Cargo.lock");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = out.join("helper");
    let mut cargo = Command::new(env::var("CARGO")?);
    // A lint run is no reason to build the helper with the linter.
    for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_ENCODED_RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    cargo.args(["rustc", "--release", "--locked", "--package", "helper"]);
    cargo.args(["--bin", "pve-sandbox-helper", "--target-dir"]).arg(&target);
    cargo.args(["--", "-C", "target-feature=+crt-static", "-C", "panic=abort"]);
    cargo.args(["-C", "strip=symbols"]);
    let built = cargo.status()?;
    if !built.success() {
        return Err(format!("the helper was not built: {built}").into());
    }
    let image = target.join("release/pve-sandbox-helper");
    // Cargo wrote down each source of the helper and of our crates that it uses: "image: a.rs b.rs".
    for sources in fs::read_to_string(image.with_extension("d"))?.lines() {
        for source in sources.split_whitespace().skip(1) {
            println!("cargo:rerun-if-changed={source}");
        }
    }
    println!("cargo:rustc-env=PVE_SANDBOX_HELPER={}", image.display());
    Ok(())
}
