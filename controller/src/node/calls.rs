//! Calls of `agent.v1`, and what a missing answer of each means.

/// Likely cause of a missing answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// The agent: nothing else is needed for an answer. Its node gets no new work for a while.
    Agent,
    /// Perhaps a sandbox: the answer waits for a container, for a process in it, or for the holder
    /// of a lock on it. A tenant can delay it at will, so it says nothing about the node.
    Sandbox,
}

/// Makes the calls of a table: each with the likely cause of its missing answer.
macro_rules! calls {
    ($($call:ident: $silence:ident,)*) => {
        /// Method of `agent.v1`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[expect(missing_docs, reason = "proto/agent/v1/agent.proto describes them")]
        pub enum Call {
            $($call,)*
        }

        impl Call {
            /// Every method.
            pub const ALL: &[Self] = &[$(Self::$call,)*];

            /// Returns the likely cause of a missing answer.
            pub fn silence(self) -> Silence {
                match self {
                    $(Self::$call => Silence::$silence,)*
                }
            }
        }
    };
}

calls! {
    // Answered from memory and the journal, or after the wait that the caller named. Only the creation
    // concerns a sandbox, and no tenant has been in it yet.
    Hello: Agent,
    Watch: Agent,
    GetLoad: Agent,
    ListSandboxes: Agent,
    GetSandbox: Agent,
    SetScheduling: Agent,
    Reserve: Agent,
    CancelReservation: Agent,
    CreateSandbox: Agent,
    RequestCertificates: Agent,
    InstallCertificates: Agent,
    SetRevokedNodes: Agent,
    SetNames: Agent,
    // Commands, files and measurements in a sandbox.
    Exec: Sandbox,
    ControlExec: Sandbox,
    ListExecs: Sandbox,
    Files: Sandbox,
    Forward: Sandbox,
    ForwardListen: Sandbox,
    ListPorts: Sandbox,
    GetUsage: Sandbox,
    ExposeHttpService: Sandbox,
    HideHttpService: Sandbox,
    CreateAccessLink: Sandbox,
    RevokeAccess: Sandbox,
    // Changes of a container: they wait for its processes, and for each other.
    CancelCreate: Sandbox,
    StartSandbox: Sandbox,
    StopSandbox: Sandbox,
    PauseSandbox: Sandbox,
    ResumeSandbox: Sandbox,
    DeleteSandbox: Sandbox,
    UpdateSandbox: Sandbox,
    RecoverSandbox: Sandbox,
    AdoptSandbox: Sandbox,
    ReleaseSandbox: Sandbox,
    ExportSandbox: Sandbox,
    ImportSandbox: Sandbox,
    // Inspections of every container of the node.
    CollectGarbage: Sandbox,
    Check: Sandbox,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn every_rpc_of_the_agent_has_a_call_kind() {
        let files =
            prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
        let services = files.file.iter().flat_map(|file| &file.service);
        let of_agent = ["AgentService", "CertificateService", "NameService"];
        let agent = services.filter(|service| of_agent.contains(&service.name()));
        let mut methods: Vec<_> =
            agent.flat_map(|service| &service.method).map(|m| m.name().to_owned()).collect();
        let mut known: Vec<_> = Call::ALL.iter().map(|call| format!("{call:?}")).collect();
        known.sort();
        methods.sort();
        assert_eq!(known, methods);
    }
}
