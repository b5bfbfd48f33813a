//! The claims of landfall, each tested by the cases that fail when it is broken. The number in a case's name is the number
//! of the claim.
#![expect(clippy::unwrap_used, reason = "tests may stop at the first surprise")]

mod agent_hostile;
mod bulk;
mod challenge;
mod control;
mod crash;
mod crash_files;
mod crash_upgrade;
mod discovery;
mod docker_attach;
mod engine_confinement;
mod ensure;
mod exhaustion;
mod fallback;
mod grants;
mod half_close;
mod hints;
mod home_files;
mod http;
mod impostor;
mod impostor_http;
mod jobs;
mod leaks;
mod least_privilege;
mod listener_floods;
mod listeners;
mod native;
mod observe;
mod other_users;
mod parity;
mod pool;
mod portbroker_container;
mod portbroker_host;
mod portbroker_inside;
mod portbroker_pair;
mod portbroker_reserved;
mod portbroker_wire;
mod reach;
mod refusal;
mod registrations;
mod replay;
mod reset;
mod restart;
mod rpc;
mod secrets;
mod stalled;
mod streams;
mod swapped;
mod tailscale;
mod tidy;
mod trust;
mod trust_verbs;
mod upgrade;
mod upstream_kinds;
mod upstreams;
mod wire_rows;

fn main() -> std::process::ExitCode {
    landfall_tests::case::main(
        &[
            streams::CASES,
            half_close::CASES,
            reset::CASES,
            swapped::CASES,
            refusal::CASES,
            stalled::CASES,
            exhaustion::CASES,
            leaks::CASES,
            pool::CASES,
            fallback::CASES,
            parity::CASES,
            reach::CASES,
            hints::CASES,
            upstreams::CASES,
            upstream_kinds::CASES,
            agent_hostile::CASES,
            listener_floods::CASES,
            listeners::CASES,
            native::CASES,
            bulk::CASES,
            control::CASES,
            engine_confinement::CASES,
            least_privilege::CASES,
            home_files::CASES,
            rpc::CASES,
            http::CASES,
            impostor::CASES,
            impostor_http::CASES,
            challenge::CASES,
            other_users::CASES,
            registrations::CASES,
            docker_attach::CASES,
            replay::CASES,
            secrets::CASES,
            restart::CASES,
            grants::CASES,
            discovery::CASES,
            jobs::CASES,
            tailscale::CASES,
            wire_rows::CASES,
            portbroker_container::CASES,
            portbroker_inside::CASES,
            portbroker_host::CASES,
            portbroker_reserved::CASES,
            portbroker_pair::CASES,
            portbroker_wire::CASES,
            ensure::CASES,
            trust::CASES,
            trust_verbs::CASES,
            tidy::CASES,
            upgrade::CASES,
            crash::CASES,
            crash_files::CASES,
            crash_upgrade::CASES,
        ],
        &[
            ("_flood", exhaustion::flood),
            ("_engine", control::engine),
            ("_serve", crash::serve),
            (native::WITHOUT_SECCOMP, native::without_seccomp),
            ("_stand_in", engine_confinement::stand_in),
        ],
    )
}
