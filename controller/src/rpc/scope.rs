//! Who may call what. Every method has an entry; what has none is refused. A test compares this
//! table with the descriptors, so that a new method cannot be forgotten.

/// What a caller needs for a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: it tells nothing of anybody.
    Open,
    /// A token with this scope.
    Scope(&'static str),
}

/// Using the sandboxes of the token's own team. Every token has it.
pub const SANDBOX: &str = "sandbox";
/// Looking at nodes and checking them.
pub const OPERATOR: &str = "operator";
/// Every scope that a token can be given.
pub const ALL: &[&str] = &[SANDBOX, OPERATOR];

const TABLE: &[(&str, Need)] = &[
    ("/grpc.health.v1.Health/Check", Need::Open),
    ("/grpc.health.v1.Health/Watch", Need::Open),
    // The schema is public.
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Need::Open),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Need::Open),
    ("/sandbox.v1.OperatorService/Fsck", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/GetVersion", Need::Scope(SANDBOX)),
    ("/sandbox.v1.OperatorService/ListNodes", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/WatchAllEvents", Need::Scope(OPERATOR)),
    ("/sandbox.v1.SandboxService/CreateSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/DeleteSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/DownloadArchive", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/Exec", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ExecCommand", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ExplainPlacement", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ExposeHttpService", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/GetSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/GetUsage", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/HideHttpService", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ListDir", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ListExecs", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ListSandboxes", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ListSnapshots", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/PauseSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ReadFile", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/RemoveFile", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ResizeExec", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/ResumeSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/SetWakeOn", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/SetLifetime", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/PruneSandboxes", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/CompareSandboxes", Need::Scope(SANDBOX)),
    ("/sandbox.v1.OperatorService/CollectGarbage", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/RecoverSandbox", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/AdoptSandbox", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/ReleaseSandbox", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/ForgetNode", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/CordonNode", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/UncordonNode", Need::Scope(OPERATOR)),
    ("/sandbox.v1.OperatorService/DrainNode", Need::Scope(OPERATOR)),
    ("/sandbox.v1.SandboxService/SignalExec", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/StartSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/StatFile", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/StopSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/StreamExec", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/UploadArchive", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/WatchEvents", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/WatchSandbox", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/WriteExecStdin", Need::Scope(SANDBOX)),
    ("/sandbox.v1.SandboxService/WriteFiles", Need::Scope(SANDBOX)),
];

/// What a path needs; `None` when there is no such method.
pub(super) fn need(path: &str) -> Option<Need> {
    TABLE.iter().find(|(method, _)| *method == path).map(|(_, need)| *need)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_method_has_an_entry_and_every_entry_a_method() {
        let mut paths = Vec::new();
        let ours = FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
        let health = FileDescriptorSet::decode(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let served = ours.file.into_iter().filter(|file| file.package() == "sandbox.v1");
        for file in served.chain(health.expect("descriptors").file) {
            for service in &file.service {
                for method in &service.method {
                    paths.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        for path in &paths {
            assert!(need(path).is_some(), "{path} has no entry");
        }
        for (path, need) in TABLE {
            let reflection = path.starts_with("/grpc.reflection.");
            assert!(reflection || paths.iter().any(|known| known == path), "{path} is no method");
            let public = path.starts_with("/grpc.");
            assert_eq!(*need == Need::Open, public, "{path}");
        }
    }
}
