//! Compiles the packages with protox (no protoc needed) and keeps the descriptor set for
//! gRPC reflection.

use std::{env, fs, path::PathBuf};

use prost::Message;

/// Messages with secrets: `src/redact.rs` shows them without.
const SECRET: &[&str] = &[
    ".sandbox.v1.CreateSandboxRequest",
    ".sandbox.v1.FileContent",
    ".sandbox.v1.ReadFileResponse",
    ".sandbox.v1.UploadArchiveRequest",
    ".sandbox.v1.DownloadArchiveResponse",
    ".sandbox.v1.ExecStart",
    ".sandbox.v1.Argv",
    ".sandbox.v1.ExecRequest",
    ".sandbox.v1.ExecResponse",
    ".sandbox.v1.WriteExecStdinRequest",
    ".sandbox.v1.ExecCommandRequest",
    ".sandbox.v1.ExecCommandResponse",
    ".sandbox.v1.ExecInfo",
    ".sandbox.v1.ForwardRequest",
    ".sandbox.v1.ForwardResponse",
    ".sandbox.v1.CreateTokenResponse",
    ".sandbox.v1.JoinRequest",
    ".sandbox.v1.CreateNodeTokenResponse",
    ".sandbox.v1.CreateAccessLinkResponse",
    ".agent.v1.CreateAccessLinkResponse",
    ".agent.v1.FilesRequest",
    ".agent.v1.FilesResponse",
    ".agent.v1.ExportSandboxResponse",
    ".agent.v1.ImportSandboxRequest",
    ".shim.v1.Start",
    ".shim.v1.Forward",
    ".shim.v1.Stdin",
    ".shim.v1.Response",
];

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
        "sandbox/v1/forward.proto",
        "sandbox/v1/operator.proto",
        "sandbox/v1/ports.proto",
        "sandbox/v1/enrolment.proto",
        "agent/v1/agent.proto",
        "agent/v1/certificates.proto",
        "agent/v1/commands.proto",
        "agent/v1/forward.proto",
        "agent/v1/names.proto",
        "agent/v1/ports.proto",
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
    tonic_prost_build::configure()
        .btree_map(".")
        .bytes(".")
        .skip_debug(SECRET)
        .compile_fds(descriptors)?;
    Ok(())
}
