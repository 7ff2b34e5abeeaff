//! Compiles the packages with protox (no protoc needed) and keeps the descriptor set for
//! gRPC reflection.

use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "sandbox/v1/access.proto",
        "sandbox/v1/audit.proto",
        "sandbox/v1/reason.proto",
        "sandbox/v1/state.proto",
        "sandbox/v1/sandbox.proto",
        "sandbox/v1/events.proto",
        "sandbox/v1/exec.proto",
        "sandbox/v1/files.proto",
        "sandbox/v1/operator.proto",
        "sandbox/v1/enrolment.proto",
        "agent/v1/agent.proto",
        "agent/v1/certificates.proto",
        "agent/v1/commands.proto",
        "shim/v1/shim.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    #[expect(clippy::disallowed_methods, reason = "cargo tells a build script so, and only so")]
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Bytes keep exec output from being copied; BTreeMap keeps iteration order the same everywhere.
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
