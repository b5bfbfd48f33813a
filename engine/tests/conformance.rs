//! One suite for every poller over the kernel: a shard observes the same on each.
//!
//! Each case runs on io_uring and on epoll, with real sockets. The bench asserts after each that no further event comes and
//! that every buffer and pipe has returned.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, which prints what it skipped")]

#[path = "conformance/bench.rs"]
mod bench;
#[path = "conformance/bytes.rs"]
mod bytes;
#[path = "conformance/channels.rs"]
mod channels;
#[path = "conformance/closing.rs"]
mod closing;
#[path = "conformance/connect.rs"]
mod connect;
#[path = "conformance/tenants.rs"]
mod tenants;
#[path = "conformance/turn.rs"]
mod turn;

macro_rules! on_both_pollers {
    ($($file:ident: $($case:ident)*;)*) => {
        mod uring {
            $($(#[test]
            fn $case() {
                super::$file::$case::<landfall_engine::reactor::Uring>(concat!("uring::", stringify!($case)));
            })*)*
        }
        mod epoll {
            $($(#[test]
            fn $case() {
                super::$file::$case::<landfall_engine::reactor::Epoll>(concat!("epoll::", stringify!($case)));
            })*)*
        }
    };
}

on_both_pollers! {
    bytes:
        bytes_are_reported_and_moved
        bytes_that_came_before_the_registration_are_reported
        a_short_read_empties_the_socket
        eof_comes_after_the_bytes
        bytes_before_a_reset_come_first
        a_blocked_write_is_reported_when_there_is_room
        bytes_that_arrive_while_a_write_is_blocked_are_remembered
        a_write_to_a_broken_connection_fails
        a_blocked_write_to_a_half_closed_peer_sleeps
        copied_bytes_arrive_in_order
        spliced_bytes_arrive_in_order
        mixed_modes_arrive_in_order
        an_urgent_byte_stays_in_the_stream
        an_urgent_byte_before_a_fin_stays_in_the_stream
        without_memory_no_byte_is_read
        a_pipe_that_holds_bytes_is_not_lent_again
        unacknowledged_bytes_are_counted;
    channels:
        messages_and_descriptors_arrive_in_order
        a_full_channel_is_reported_when_it_has_room;
    closing:
        a_close_sends_the_fin
        a_close_after_reset_on_close_is_a_reset
        a_socket_that_is_closed_at_once_has_no_event
        a_reported_close_frees_the_port
        a_closed_socket_is_closed_although_others_were_reported
        a_duplicate_held_elsewhere_causes_no_event;
    connect:
        a_connect_reaches_a_listener
        a_connect_to_a_closed_port_is_refused
        a_connect_that_was_reset_since_is_distinguished
        a_connect_to_itself_is_detected
        a_connect_in_progress_is_not_reported
        accepts_take_the_queue_one_by_one
        an_accept_without_descriptors_is_exhausted;
    tenants:
        both_sides_of_a_socket_are_reported
        a_reused_descriptor_number_gets_no_old_events
        a_thousand_sockets_are_all_reported;
    turn:
        a_reset_is_an_error_and_a_fin_is_not
        two_fins_are_a_hang_up_and_no_error
        a_waker_ends_a_wait
        a_deadline_is_kept;
}
