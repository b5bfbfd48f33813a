//! One suite for every ring over the kernel: what a shard can observe is the same on each.
//!
//! Each case runs on io_uring and on epoll, with real sockets. The bench asserts after each that every operation was told
//! exactly once, that nothing more is told, and that every lease and pipe has come back.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, which says what it skipped")]

#[path = "conformance/bench.rs"]
mod bench;
#[path = "conformance/bytes.rs"]
mod bytes;
#[path = "conformance/cancel.rs"]
mod cancel;
#[path = "conformance/connect.rs"]
mod connect;
#[path = "conformance/dials.rs"]
mod dials;
#[path = "conformance/tenants.rs"]
mod tenants;
#[path = "conformance/turn.rs"]
mod turn;

macro_rules! on_both_rings {
    ($($file:ident: $($case:ident)*;)*) => {
        mod uring {
            $($(#[test]
            fn $case() {
                super::$file::$case::<landfall_engine::ring::UringRing>(concat!("uring::", stringify!($case)));
            })*)*
        }
        mod epoll {
            $($(#[test]
            fn $case() {
                super::$file::$case::<landfall_engine::ring::EpollRing>(concat!("epoll::", stringify!($case)));
            })*)*
        }
    };
}

on_both_rings! {
    bytes:
        a_read_waits_and_then_completes
        an_eager_read_takes_what_is_there
        a_read_finds_what_came_before_it
        eof_comes_after_the_bytes
        bytes_before_a_reset_come_first
        a_send_ends_when_the_last_byte_has_left
        a_send_to_a_broken_connection_gives_the_loan_back
        copied_bytes_arrive_in_order
        spliced_bytes_arrive_in_order
        mixed_ways_arrive_in_order
        an_urgent_byte_stays_in_the_stream
        without_a_loan_the_read_says_so_only_when_there_is_something
        a_pipe_that_holds_bytes_is_not_lent_again
        a_blocked_send_to_a_half_closed_peer_sleeps
        unacknowledged_bytes_are_counted;
    cancel:
        a_cancelled_read_is_told_once
        a_cancelled_accept_is_told_once
        a_cancelled_connect_is_told_once
        a_cancelled_send_gives_back_what_is_left
        a_cancelled_watch_is_told_once
        a_cancelled_stock_is_told_once
        a_late_cancel_hits_nobody;
    connect:
        a_connect_reaches_a_listener
        a_connect_to_nobody_is_refused
        a_connect_to_itself_is_found_out
        a_second_wait_is_not_fooled_by_the_first
        accepts_take_the_queue_one_by_one
        an_accept_tells_the_family
        an_accept_without_descriptors_is_exhausted;
    dials:
        answers_to_dials_come_in_any_order
        a_request_waits_while_the_channel_is_full;
    tenants:
        three_operations_wait_on_one_socket
        a_number_s_next_tenant_hears_nothing_of_the_last
        a_socket_given_back_can_be_adopted_again;
    turn:
        a_watch_tells_a_reset_and_no_fin
        a_watch_tells_two_fins
        a_watch_finds_a_break_that_came_before
        a_waker_ends_a_wait
        a_deadline_is_kept
        what_is_settled_is_told_at_once;
}
