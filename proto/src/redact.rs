//! `Debug` of the messages that carry secrets: environments, command lines, contents of files, input
//! and output, tokens. It shows that a field is there, and never its value. build.rs skips the derived
//! one for exactly these messages.
//!
//! Each field of a message is named here, so that a new one does not compile before somebody has
//! decided whether it is shown.

use std::fmt::{Debug, Formatter, Result};

use crate::{agent::v1 as agent, sandbox::v1 as api, secret::HIDDEN, shim::v1 as shim};

/// Shows a message: the fields before the semicolon with their values, those behind it without.
macro_rules! message {
    ($package:ident :: $name:ident { $($shown:ident),* ; $($hidden:ident),* }) => {
        impl Debug for $package::$name {
            fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                let Self { $($shown,)* $($hidden: _,)* } = self;
                f.debug_struct(stringify!($name))
                    $(.field(stringify!($shown), $shown))*
                    $(.field(stringify!($hidden), &format_args!("{HIDDEN}")))*
                    .finish()
            }
        }
    };
}

/// Shows an alternative: the cases before the semicolon with their values, those behind it without.
macro_rules! one_of {
    ($package:ident :: $module:ident :: $name:ident { $($shown:ident),* ; $($hidden:ident),* }) => {
        impl Debug for $package::$module::$name {
            fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                match self {
                    $(Self::$shown(value) => f.debug_tuple(stringify!($shown)).field(value).finish(),)*
                    $(Self::$hidden(_) => write!(f, "{}({HIDDEN})", stringify!($hidden)),)*
                }
            }
        }
    };
}

message!(api::CreateSandboxRequest {
    request_id, snapshot_id, size, network, services, node, wait, lifetime, size_preset, placement,
    name, files, files_user, egress, egress_names, no_default_services, expose_on_listen;
    metadata, env
});
message!(api::FileContent { path, mode; content });
message!(api::ReadFileResponse { file; data });
message!(api::UploadArchiveRequest { message; });
one_of!(api::upload_archive_request::Message { Start; Data });
message!(api::DownloadArchiveResponse { ; data });

message!(api::ExecStart {
    id, user, timeout, tty, window, exec_id, detached, spare_background;
    command, cwd, env, title
});
one_of!(api::exec_start::Command { Sftp ; Argv, Shell });
message!(api::Argv { ; args });
message!(api::ExecRequest { message; });
one_of!(api::exec_request::Message { Start, StdinEof, Resize, Signal, Attach; Stdin });
message!(api::ExecResponse { message; });
one_of!(api::exec_response::Message { Started, Exit; Stdout, Stderr });
message!(api::WriteExecStdinRequest { id, exec_id, offset, eof; data });
message!(api::ExecCommandRequest { start; stdin });
message!(api::ExecCommandResponse { exit, truncated, still_running, exec_id; stdout, stderr });
message!(api::ExecInfo {
    exec_id, started_at, exit, lost, stdout_bytes, stderr_bytes, attached, tty, inactive;
    command
});

message!(api::ForwardRequest { message; });
one_of!(api::forward_request::Message { Open, Eof; Data });
message!(api::ForwardResponse { message; });
one_of!(api::forward_response::Message { Opened, Eof; Data });

message!(api::CreateTokenResponse { token, certificate; text });
message!(api::JoinRequest { node, address, agent_csr, ingress_csr, pool, number; token });
message!(api::CreateNodeTokenResponse { expires_at, ca_sha256, names; token });
message!(api::CreateAccessLinkResponse { kind, expires_at, port; url, credential });
message!(agent::CreateAccessLinkResponse { sandbox, kind, expires_at, port; credential });

message!(agent::FilesRequest { message; });
one_of!(agent::files_request::Message { Write, Read, Stat, List, Remove, Upload, Download; Data });
message!(agent::FilesResponse { message; });
one_of!(agent::files_response::Message { Write, File, List, Remove, Upload; Data });
message!(agent::ExportSandboxResponse { node; record });
message!(agent::ImportSandboxRequest { epoch; record });

message!(shim::Start {
    exec_id, keep, timeout_ms, window, started_ms, start_by_ms, detached, files, spare_background;
    digest, order, title, mark
});
message!(shim::Forward { start_by_ms; order, mark });
message!(shim::Stdin { exec_id, offset, eof; data });
message!(shim::Response { message; });
one_of!(shim::response::Message { Started, Exit, Refused, Done, Execs, Outputs, Eof; Stdout, Stderr });

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "canary-7f3a";

    /// Builds the message of a field with the canary, as it comes over the wire, and shows it.
    fn shown<M: prost::Message + Debug + Default>(field: u32) -> String {
        let mut bytes = Vec::new();
        prost::encoding::string::encode(field, &CANARY.to_owned(), &mut bytes);
        let message = M::decode(bytes.as_slice()).expect("a message");
        assert_eq!(message.encode_to_vec(), bytes, "the field is there");
        format!("{message:?} {message:#?}")
    }

    #[test]
    fn secrets_of_messages_are_not_shown() {
        let all = [
            shown::<api::FileContent>(2),
            shown::<api::ReadFileResponse>(2),
            shown::<api::UploadArchiveRequest>(2),
            shown::<api::DownloadArchiveResponse>(1),
            shown::<api::ExecStart>(3),
            shown::<api::ExecStart>(4),
            shown::<api::ExecStart>(13),
            shown::<api::Argv>(1),
            shown::<api::ExecRequest>(2),
            shown::<api::ExecResponse>(2),
            shown::<api::ExecResponse>(3),
            shown::<api::WriteExecStdinRequest>(4),
            shown::<api::ExecCommandRequest>(2),
            shown::<api::ExecCommandResponse>(2),
            shown::<api::ExecCommandResponse>(3),
            shown::<api::ExecInfo>(2),
            shown::<api::ForwardRequest>(2),
            shown::<api::ForwardResponse>(2),
            shown::<api::CreateTokenResponse>(2),
            shown::<api::JoinRequest>(1),
            shown::<api::CreateNodeTokenResponse>(1),
            shown::<api::CreateAccessLinkResponse>(1),
            shown::<api::CreateAccessLinkResponse>(2),
            shown::<agent::CreateAccessLinkResponse>(2),
            shown::<agent::FilesRequest>(8),
            shown::<agent::FilesResponse>(6),
            shown::<agent::ExportSandboxResponse>(2),
            shown::<agent::ImportSandboxRequest>(2),
            shown::<shim::Start>(3),
            shown::<shim::Start>(4),
            shown::<shim::Start>(7),
            shown::<shim::Start>(8),
            shown::<shim::Forward>(1),
            shown::<shim::Forward>(2),
            shown::<shim::Stdin>(3),
            shown::<shim::Response>(2),
            shown::<shim::Response>(3),
        ];
        for text in all {
            assert!(!text.contains(CANARY) && text.contains(HIDDEN), "{text}");
            // Bytes are shown as numbers in some forms.
            assert!(!text.contains("99, 97, 110"), "{text}");
        }
    }

    #[test]
    fn secrets_are_not_shown_inside_of_other_messages() {
        let pairs = || [(CANARY.to_owned(), CANARY.to_owned())].into();
        let create = api::CreateSandboxRequest {
            request_id: "r-1".into(),
            env: pairs(),
            metadata: pairs(),
            files: vec![api::FileContent { content: CANARY.into(), ..Default::default() }],
            ..Default::default()
        };
        let to_agent = agent::CreateSandboxRequest { spec: Some(create), ..Default::default() };
        let text = format!("{to_agent:?}");
        assert!(!text.contains(CANARY) && text.contains("r-1"), "{text}");
        let start = api::ExecStart {
            command: Some(api::exec_start::Command::Argv(api::Argv { args: vec![CANARY.into()] })),
            env: pairs(),
            exec_id: "run-1".into(),
            ..Default::default()
        };
        let message = Some(api::exec_request::Message::Start(start));
        let exec = agent::ExecRequest {
            message: Some(api::ExecRequest { message }),
            ..Default::default()
        };
        let text = format!("{exec:?}");
        assert!(!text.contains(CANARY) && text.contains("run-1"), "{text}");
        let start = shim::Start { order: CANARY.into(), ..Default::default() };
        let request = shim::Request { message: Some(shim::request::Message::Start(start)) };
        assert!(!format!("{request:?}").contains(CANARY));
    }
}
