//! Claims 1, 2, 3, 4 and 9 by the other ways into a container: sockets of an agent, and a driver that dials.

use landfall_engine::command::UpstreamKind;
use landfall_engine::ring::RingChoice;
use landfall_tests::case::Case;
use landfall_tests::enter_by;

use crate::{half_close, leaks, refusal, reset, streams};

/// A case for a claim's test by each of the ways.
macro_rules! cases {
    ($($dialler:ident, $agent:ident: $test:path;)*) => {
        $(
            fn $dialler(ring: RingChoice) {
                enter_by(UpstreamKind::Dialler);
                $test(ring);
            }

            fn $agent(ring: RingChoice) {
                enter_by(UpstreamKind::Agent);
                $test(ring);
            }
        )*
        pub(crate) const CASES: &[Case] = &[$(
            Case::each_ring(stringify!($dialler), $dialler),
            Case::each_ring(stringify!($agent), $agent),
        )*];
    };
}

cases! {
    c01_by_a_driver_every_byte_arrives, c01_by_an_agent_every_byte_arrives:
        streams::every_byte_arrives_once_in_order;
    c02_by_a_driver_megabytes_after_a_fin, c02_by_an_agent_megabytes_after_a_fin:
        half_close::ten_mebibytes_come_back_after_a_fin;
    c02_by_a_driver_both_finish_at_once, c02_by_an_agent_both_finish_at_once:
        half_close::both_ends_finish_at_once;
    c02_by_a_driver_a_fin_right_after_connect, c02_by_an_agent_a_fin_right_after_connect:
        half_close::a_fin_right_after_connect;
    c02_by_a_driver_a_half_closed_one_stays, c02_by_an_agent_a_half_closed_one_stays:
        half_close::a_half_closed_connection_stays;
    c03_by_a_driver_a_reset_stays_one, c03_by_an_agent_a_reset_stays_one:
        reset::as_it_does_directly;
    c03_by_a_driver_a_stalled_reader_is_reset, c03_by_an_agent_a_stalled_reader_is_reset:
        reset::a_reset_finds_a_reader_that_stalls;
    c03_by_a_driver_a_megabyte_before_a_reset, c03_by_an_agent_a_megabyte_before_a_reset:
        reset::a_megabyte_before_a_reset_arrives;
    c03_by_a_driver_the_unacknowledged_arrives, c03_by_an_agent_the_unacknowledged_arrives:
        reset::what_is_not_yet_acknowledged_arrives;
    c04_by_a_driver_a_refused_connect_is_a_reset, c04_by_an_agent_a_refused_connect_is_a_reset:
        refusal::a_refused_connect_is_a_reset;
    c04_by_a_driver_a_server_that_ends, c04_by_an_agent_a_server_that_ends:
        refusal::a_server_that_ends;
    c09_by_a_driver_churn_leaks_nothing, c09_by_an_agent_churn_leaks_nothing:
        leaks::churn;
    c09_by_a_driver_nothing_is_left, c09_by_an_agent_nothing_is_left:
        leaks::engines_and_upstreams;
}
